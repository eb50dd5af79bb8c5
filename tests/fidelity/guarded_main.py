print(__name__)
if __name__ == "__main__":
    print("guarded")
import __main__

print(__main__.__file__ == __file__)
