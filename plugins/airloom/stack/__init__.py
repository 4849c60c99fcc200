"""The platform as containers: Compose, preflight, what the platform's image runs, and provisioning."""
