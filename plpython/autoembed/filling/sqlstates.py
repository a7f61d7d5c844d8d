"""The SQLSTATEs that a fill tells apart, and what each of them means for it."""

CANCELED = "57014"
REFUSED = "42501"
OUT_OF_MEMORY = "53200"
TOO_LARGE = "54000"
"""A claim ends with it whose texts together are more than an array can hold, a gigabyte."""
BUSY = ("40001", "40P01", "55P03")
"""Another transaction was in the way."""
NOBODYS = ("08", "0A", "25", "26", "2D", "34", "3B", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "XX")
"""Classes that speak of the server, the call or the relation. Any other that a write ends with is the row's own:
its constraint's, its policy's, or its trigger's, which chooses as it likes."""
CALLS_OWN = ("08", "25", "2D", "53", "57", "58", "XX")
"""Classes that end a call; any other ends the fill of one column."""


def is_rows_own(state: str) -> bool:
    """Tells whether a write that ended with this SQLSTATE was refused because of one of its rows."""
    return state == REFUSED or not state.startswith(NOBODYS)
