import copyreg
import dataclasses
import pickle


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    x: int
    y: float = 2.5


data = pickle.dumps(Point(1), protocol=4)
print(data, pickle.loads(data), pickle.loads(data) == Point(1), dataclasses.asdict(Point(1)))
print(len(copyreg.dispatch_table))
