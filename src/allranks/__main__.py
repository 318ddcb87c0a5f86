from allranks.cli import main

main()
