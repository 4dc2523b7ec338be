import threading
from contextlib import ExitStack, suppress
from itertools import pairwise

from dynamicvis_geo.earthengine.limiter import CancelledError, Limiter


class Service:
    """A server that lets in so many requests at a time, and its client."""

    def __init__(self, capacity: int, most: int) -> None:
        self.capacity = capacity
        self.limiter = Limiter(most)

    def round(self) -> int:
        """Send as many requests as are allowed; return how many were refused."""
        admitted = self.limiter.limit
        refused = max(0, admitted - self.capacity)
        slots = []
        for _ in range(admitted):
            stack = ExitStack()
            stack.enter_context(self.limiter.slot())
            slots.append(stack)
        for i, stack in enumerate(slots):
            if i < refused:
                self.limiter.refused()
            else:
                self.limiter.answered()
            stack.close()
        return refused


def test_a_burst_finds_the_capacity_of_the_server() -> None:
    service = Service(capacity=8, most=32)
    assert service.round() == 24
    assert service.limiter.limit == 8
    assert service.round() == 0


def test_refusals_become_rare() -> None:
    service = Service(capacity=8, most=32)
    service.round()
    refused = sum(service.round() for _ in range(500))
    # Each costs one request; the patience between them grows up to 64 rounds.
    assert 3 <= refused <= 12
    assert service.limiter.limit in (8, 9)


def test_recovery_is_gradual_and_complete() -> None:
    service = Service(capacity=1, most=16)
    service.round()
    service.capacity = 16
    limits = []
    while service.limiter.limit < 16:
        service.round()
        limits.append(service.limiter.limit)
    steps = [b - a for a, b in pairwise(limits)]
    assert max(steps) == 1
    assert len(limits) < 100


def test_slots_are_never_more_than_the_limit() -> None:
    limiter = Limiter(3)
    inside, peak, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, peak
        for _ in range(50):
            with limiter.slot():
                with lock:
                    inside += 1
                    peak = max(peak, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak <= 3
    assert limiter.in_flight == 0


def test_nobody_asks_before_the_server_wants_to_be_asked() -> None:
    now = 100.0
    limiter = Limiter(2, clock=lambda: now)
    with limiter.slot():
        limiter.refused(retry_after=5)
    assert limiter._wait() == 5
    now = 104.0
    assert limiter._wait() == 1
    now = 105.0
    with limiter.slot():
        assert limiter.in_flight == 1


def test_a_limit_of_one_remains() -> None:
    limiter = Limiter(1)
    for _ in range(3):
        with limiter.slot():
            limiter.refused()
    assert limiter.limit == 1


class Asked(threading.Event):
    """Not set, and tells who waits for it that somebody has looked."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def is_set(self) -> bool:
        self.looked.set()
        return super().is_set()


def test_slots_are_given_in_the_order_in_which_they_are_asked_for() -> None:
    limiter = Limiter(1)
    order: list[int] = []

    def ask(number: int, cancelled: threading.Event) -> None:
        with limiter.slot(cancelled):
            order.append(number)

    threads = []
    with limiter.slot():
        for number in range(8):
            asked = Asked()
            threads.append(threading.Thread(target=ask, args=(number, asked)))
            threads[-1].start()
            # It looks when it is in the queue.
            asked.looked.wait()
    # Whoever has just given a slot back is the first to ask for one.
    with limiter.slot():
        order.append(8)
    for thread in threads:
        thread.join()
    assert order == list(range(9))


def test_one_who_gives_up_leaves_the_place_to_the_next() -> None:
    limiter = Limiter(1)
    first, second = Asked(), Asked()
    entered = threading.Event()

    def give_up() -> None:
        with suppress(CancelledError), limiter.slot(first):
            raise AssertionError('it had been cancelled')

    def enter() -> None:
        with limiter.slot(second):
            entered.set()

    threads = [threading.Thread(target=give_up), threading.Thread(target=enter)]
    with limiter.slot():
        for thread, asked in zip(threads, (first, second), strict=True):
            thread.start()
            asked.looked.wait()
        first.set()
        threads[0].join()
        assert not entered.is_set()
    entered.wait()
    threads[1].join()
