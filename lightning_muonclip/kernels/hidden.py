"""What an additive mask hides."""

#: A pair whose additive mask is at most this is hidden. Libraries hide pairs by -inf, by the lowest number of a dtype or by
#: -1e4, perhaps with a position bias on top. A bias alone does not hide, and a pair with this much of it has no weight.
HIDDEN = -9e3
