"""The watchdog of work on a device."""

import threading
import time

from distflash.transport.watch import Watch

SOON = 5.0


class Asked:
    """What the watch says when it is stuck."""

    def __init__(self, give_up: bool) -> None:
        self.give_up, self.words, self.called = give_up, [], threading.Event()

    def __call__(self, what: str, seconds: float) -> bool:
        self.words.append((what, seconds))
        self.called.set()
        return self.give_up


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "distflash watch"]


def no_thread_soon() -> bool:
    deadline = time.monotonic() + SOON
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_nobody_is_asked_while_things_get_done_and_the_thread_ends():
    asked = Asked(give_up=True)
    watch = Watch(asked, interval=0.01)
    for n in range(20):
        watch.add(lambda: True, f"exchange {n}")
        time.sleep(0.005)
    assert no_thread_soon() and not asked.words
    watch.add(lambda: True, "one more")  # a new thread
    assert threads() and no_thread_soon()


def test_the_first_that_is_not_done_is_named_and_the_thread_ends_when_told():
    asked, flags = Asked(give_up=True), [True, True, False, False]
    watch = Watch(asked, interval=0.01)
    for n, done in enumerate(flags):
        watch.add(lambda done=done: done, f"exchange {n}")
    assert asked.called.wait(SOON) and no_thread_soon()
    assert [what for what, _ in asked.words] == ["exchange 2"]


def test_time_counts_from_the_last_thing_that_got_done():
    asked, done, before = Asked(give_up=False), threading.Event(), 0.3
    watch = Watch(asked, interval=0.01)
    watch.add(done.is_set, "first")
    watch.add(lambda: False, "second")
    time.sleep(before)
    done.set()
    deadline = time.monotonic() + SOON
    while asked.words[-1][0] != "second" and time.monotonic() < deadline:
        time.sleep(0.01)
    asked.give_up = True
    (*_, longest), (second, *_) = ([s for what, s in asked.words if what == name] for name in ("first", "second"))
    assert second < longest and longest > before / 2
    assert no_thread_soon()


class Event:
    """One that is done, and notes which thread lets go of it."""

    def __init__(self, threads: list[str]) -> None:
        self.threads = threads

    def query(self) -> bool:
        return True

    def __del__(self) -> None:
        self.threads.append(threading.current_thread().name)


def test_the_thread_destroys_no_event():
    """Where that waits for a copy to the host, and the copy for a rank that failed, nobody would end the wait."""
    destroyed: list[str] = []
    watch = Watch(Asked(give_up=False), interval=0.01)
    for n in range(20):
        watch.add(Event(destroyed).query, f"exchange {n}")
        time.sleep(0.005)
    assert no_thread_soon()
    watch.add(lambda: True, "one more")
    assert destroyed == 20 * [threading.current_thread().name] and no_thread_soon()
