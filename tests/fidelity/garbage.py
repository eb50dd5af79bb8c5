import gc

print(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.garbage, gc.callbacks)


class Node:
    def __del__(self):
        print("collected")


node = Node()
node.self = node
del node
print(gc.collect() > 0)
print(len([o for o in gc.get_objects() if isinstance(o, Node)]))
left = Node()
left.self = left
