"""The app: upload data, pick a method, train, and compare refusals before and after.

`server` starts it; `page` puts the four steps in `views/` on one page; `jobs` and `worker` train, each job in a
process of its own; `orders` makes the recipes that they run. All wording is in `texts`. Of safe_trainer only public
names are used.
"""
