"""All faults, by name."""

from chaos import faults_agent, faults_cluster, faults_driver, faults_node, faults_policy
from chaos.fault import CATALOGUE, Fault

FAMILIES = (faults_agent, faults_cluster, faults_driver, faults_node, faults_policy)

__all__ = ["CATALOGUE", "FAMILIES", "Fault"]
