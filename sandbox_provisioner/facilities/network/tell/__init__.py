"""tell - pure: what people and programs are told of a sandbox's network."""

# The step at which PID 1 sees the end of the channel of a gateway that has refused it. Why it did
# the gateway says to the server alone.
REFUSED_AT = "hand-out-listeners"
