"""Which tile of which weight when: plain host data, for every GPU backend. Needs torch alone.

config.py has the launch parameters, layout.py describes weights in memory and the blocks their
tiles are made of, schedule.py cuts and orders the tiles.
"""
