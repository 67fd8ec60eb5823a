"""facts - who launches, reads only: what of a work directory the host would run or trust."""
