"""Who hangs and who has died: the ranks look after each other."""
