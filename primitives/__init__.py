"""Floor 1: the vocabulary and the asyncio API. Reading this folder teaches all of it."""
