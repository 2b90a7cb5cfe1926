"""Making a model forget: one small loop, its objectives, and the edit that it leaves."""
