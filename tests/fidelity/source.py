import inspect
import linecache


class Shape:
    """A shape."""

    def area(self):
        return 1


print(inspect.getsource(Shape), inspect.getfile(Shape), inspect.getsourcelines(Shape.area))
print(linecache.getline(__file__, 5), Shape.__module__, inspect.getmodule(Shape))
print(inspect.stack()[0].filename, inspect.stack()[0].lineno, Shape)
