# SPDX-License-Identifier: MIT
"""Drafters: who proposes the tokens that a step then verifies.

Refuses to know how deep to draft, which drafts were accepted and why, and when requests begin.
"""
