"""figures - what files of /proc and /sys tell of memory and CPUs is what the box has of them."""
