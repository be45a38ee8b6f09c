from medibot.cli import main

main()
