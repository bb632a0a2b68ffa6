"""LoRA adapters: their files read and written; as the experts of one mixture, and back; pools made smaller."""
