"""facts - whoever launches; reads only: what this machine has of networks."""
