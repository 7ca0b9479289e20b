"""`hetlora doctor`: is this machine fit for a run, is this configuration, and does its federation do what it promises?"""
