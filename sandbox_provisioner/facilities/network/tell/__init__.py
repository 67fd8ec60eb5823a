"""tell - pure: what people and programs are told of a sandbox's network."""
