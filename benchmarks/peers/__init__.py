"""What the comparisons with other simulators share: the work that both sides do, and the client a user of PEFT would write."""
