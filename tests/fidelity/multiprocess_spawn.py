import multiprocessing
from multiprocessing import shared_memory


def work(queue, name):
    memory = shared_memory.SharedMemory(name=name)
    queue.put((__name__, bytes(memory.buf[:3])))
    memory.close()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    memory = shared_memory.SharedMemory(create=True, size=16)
    memory.buf[:3] = b"abc"
    queue = context.Queue()
    child = context.Process(target=work, args=(queue, memory.name))
    child.start()
    print(queue.get(timeout=10))
    child.join()
    print(child.exitcode)
    memory.close()
    memory.unlink()
