"""The app: choose data and a method, train, and compare refusals before and after.

`server` starts it; `page` puts the four steps in `views/` on one page; `actions` is what can be done there; `jobs` and
`worker` run recipes, each job in a process of its own; `recipes` makes them from what was chosen, and the cards from
the library's methods. All wording is in `texts`. Of safe_trainer only public names are used.
"""
