"""What is unpacked or fetched as a whole, for many samples at once: the last of it, up to a bound of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Held:
    """Values by place, up to `room` bytes in each process; one value is always held.

    When there is no room, what was asked for as often as it has samples goes first, since an epoch needs it no more;
    then what was not asked for for the longest time.
    """

    def __init__(self, room: int):
        self.room = room
        self._clear()

    def _clear(self) -> None:
        self.used = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._asked: dict[Hashable, int] = {}
        self._spent: dict[Hashable, None] = {}

    def __contains__(self, place: Hashable) -> bool:
        return place in self._values

    def get(self, place: Hashable, samples: int, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value at a place that holds so many samples; `make` gives value and bytes of one that is not held."""
        if place not in self._values:
            self._hold(place, *make())
        self._values.move_to_end(place)
        self._spent.pop(place, None)
        self._asked[place] = self._asked.get(place, 0) + 1
        if self._asked[place] == samples:
            self._asked[place], self._spent[place] = 0, None
        return self._values[place][0]

    def _hold(self, place: Hashable, value: Any, size: int) -> None:
        self.used += size
        while self._values and self.used > self.room:
            last = next(iter(self._spent or self._values))
            self.used -= self._values.pop(last)[1]
            self._spent.pop(last, None)
            self._asked.pop(last, None)
        self._values[place] = value, size

    def __getstate__(self) -> dict[str, Any]:
        return {"room": self.room}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.room = state["room"]
        self._clear()
