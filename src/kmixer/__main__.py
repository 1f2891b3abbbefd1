"""python -m kmixer"""

from kmixer.cli.main import main

main()
