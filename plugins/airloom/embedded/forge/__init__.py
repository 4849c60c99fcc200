"""A git server that speaks the part of GitBucket that Airloom uses.

git smart HTTP, `/api/v3`, pages at GitBucket's URLs, push events to registered hooks, and the builder
that receives them.
"""
