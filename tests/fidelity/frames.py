import sys
import traceback

frame, depth = sys._getframe(), 0
while frame:
    print(frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno)
    frame, depth = frame.f_back, depth + 1
print(depth)
traceback.print_stack()
