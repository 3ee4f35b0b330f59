"""Recorded and played searches beside kvjax's own: does it answer what LightZero answers?"""
