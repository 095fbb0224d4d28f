"""PEFT adapters in: folders and the Hub, checked before anything is written."""
