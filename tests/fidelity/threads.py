import threading
import time

results = []


def work(number):
    time.sleep(0.01 * number)
    results.append(number)


threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
main = threading.main_thread()
print(sorted(results), main.name, main is threading.current_thread(), main.ident == threading.get_ident())
print(main.native_id == threading.get_native_id(), threading.active_count(), threading.enumerate() == [main])
print(threading.Thread().name, threading.stack_size())


def late():
    time.sleep(0.1)
    print("after the main thread's end")


threading.Thread(target=late).start()
print("end of main")
