"""Keys that Ray's own schema leaves unchecked: what its providers and the clouds read. A nested mapping lists a key's own."""

from __future__ import annotations

from typing import Any


def _keys(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())


_COMMON = _keys(
    "type use_internal_ips cache_stopped_nodes disable_node_updaters disable_launch_config_check"
)

PROVIDER: dict[str, dict[str, Any]] = {
    "aws": {
        **_COMMON,
        **_keys("region availability_zone cloudwatch aws_credentials"),
        "security_group": _keys("GroupName IpPermissions"),
    },
    "gcp": _COMMON | _keys("region availability_zone project_id gcp_credentials"),
    "local": _COMMON | _keys("head_ip worker_ips external_head_ip coordinator_address"),
}

# Without these the provider fails after `ray up` began.
REQUIRED: dict[str, tuple[str, ...]] = {
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
}

# EC2's RunInstances, as boto3's create_instances takes it, and Ray's own SubnetIds.
_AWS: dict[str, Any] = {
    **_keys(
        "ImageId InstanceType KeyName SubnetId SubnetIds SecurityGroupIds SecurityGroups UserData Monitoring Placement "
        "EbsOptimized "
        "NetworkInterfaces PrivateIpAddress Ipv6AddressCount Ipv6Addresses TagSpecifications LaunchTemplate CreditSpecification "
        "CpuOptions CapacityReservationSpecification HibernationOptions LicenseSpecifications MetadataOptions EnclaveOptions "
        "PrivateDnsNameOptions MaintenanceOptions DisableApiStop DisableApiTermination InstanceInitiatedShutdownBehavior "
        "AdditionalInfo ClientToken DryRun RamdiskId KernelId EnablePrimaryIpv6 NetworkPerformanceOptions "
        "ElasticGpuSpecification ElasticInferenceAccelerators"
    ),
    "BlockDeviceMappings": {
        **_keys("DeviceName VirtualName NoDevice"),
        "Ebs": _keys(
            "VolumeSize VolumeType DeleteOnTermination Encrypted Iops KmsKeyId SnapshotId Throughput OutpostArn"
        ),
    },
    "IamInstanceProfile": _keys("Name Arn"),
    "InstanceMarketOptions": {
        "MarketType": None,
        "SpotOptions": _keys(
            "MaxPrice SpotInstanceType BlockDurationMinutes ValidUntil InstanceInterruptionBehavior"
        ),
    },
}

# Compute Engine's Instance, and Ray's own sourceInstanceTemplate and TPU keys.
_GCP: dict[str, Any] = {
    **_keys(
        "machineType metadata labels tags networkInterfaces networkPerformanceConfig canIpForward minCpuPlatform description "
        "hostname deletionProtection shieldedInstanceConfig confidentialInstanceConfig displayDevice reservationAffinity "
        "resourcePolicies advancedMachineFeatures privateIpv6GoogleAccess sourceMachineImage sourceInstanceTemplate params "
        "keyRevocationActionType instanceEncryptionKey acceleratorType acceleratorConfig runtimeVersion networkConfig "
        "schedulingConfig serviceAccount dataDisks"
    ),
    "disks": {
        **_keys(
            "boot autoDelete type mode source deviceName index interface diskSizeGb kind diskEncryptionKey guestOsFeatures"
        ),
        **_keys("licenses architecture forceAttach savedState"),
        "initializeParams": _keys(
            "diskSizeGb diskType sourceImage diskName labels description sourceSnapshot resourcePolicies provisionedIops "
            "provisionedThroughput onUpdateAction licenses architecture resourceManagerTags"
        ),
    },
    "guestAccelerators": _keys("acceleratorType acceleratorCount"),
    "scheduling": _keys(
        "preemptible onHostMaintenance automaticRestart provisioningModel instanceTerminationAction maxRunDuration "
        "nodeAffinities minNodeCpus locationHint availabilityDomain terminationTime onInstanceStopAction localSsdRecoveryTimeout "
        "hostErrorTimeoutSeconds"
    ),
    "serviceAccounts": _keys("email scopes"),
}

NODE_CONFIG: dict[str, dict[str, Any]] = {"aws": _AWS, "gcp": _GCP}

MACHINE_TYPE = {"aws": "InstanceType", "gcp": "machineType"}
