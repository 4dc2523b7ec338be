"""The arguments of the commands, without what the commands themselves import."""

from dynamicvis_geo.arguments import embedding, evaluation, model, pictures, predict

#: Modules whose ``add_commands`` adds commands, in the order in which help lists them.
MODULES = (embedding, predict, evaluation, pictures, model)
