"""benchmarks - what a sandboxed kernel costs beside a plain one; see README.md in this folder."""
