"""The value at which an additive mask hides a pair."""

#: A pair is hidden where its additive mask is at most this. Libraries hide pairs with -inf, with the lowest value of a dtype
#: or with -1e4, sometimes plus a position bias. No bias alone reaches this value; a pair that far down has no weight anyway.
HIDDEN = -9e3
