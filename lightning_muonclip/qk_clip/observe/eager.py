"""No compiled code while a forward is about to be surveyed: a graph cannot hold a survey."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class Eager:
    """Keeps torch.compile off as long as somebody needs it."""

    def __init__(self) -> None:
        #: The ids of those who do.
        self.users: set[int] = set()
        self._stance: Any = None

    def acquire(self, user: object) -> None:
        """Keeps it off until :meth:`release`, or until nothing refers to the user."""
        if not self.users:
            self._stance = torch.compiler.set_stance("force_eager")
        self.users.add(id(user))
        weakref.finalize(user, self._release, id(user))

    def release(self, user: object) -> None:
        """Ends what a user has begun, if anything."""
        self._release(id(user))

    def _release(self, user: int) -> None:
        self.users.discard(user)
        if not self.users and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


eager = Eager()
