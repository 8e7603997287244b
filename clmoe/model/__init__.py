"""LLaVA-1.5, the LoRA-expert layers that patch it, and the routers that steer them."""
