"""The fault campaign: `python -m tinsmith.chaos`; see `docs/chaos.md`."""
