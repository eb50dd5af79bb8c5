import multiprocessing


def square(x):
    return x * x


if __name__ == "__main__":
    print(multiprocessing.get_start_method(), multiprocessing.current_process().name)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(square(7)))
    child.start()
    print(queue.get(timeout=5))
    child.join()
    print(child.exitcode, multiprocessing.active_children())
