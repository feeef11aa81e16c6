"""Methods that came after NeMo: take the neurons out for good, attack, detect, find the region, change the guidance."""
