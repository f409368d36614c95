"""A cluster of two to four hosts on one Linux machine, made to be broken (docs/chaos.md)."""
