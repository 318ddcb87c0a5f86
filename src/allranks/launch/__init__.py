"""From one command line to every rank: what is started, by which launcher, and who watches over it."""
