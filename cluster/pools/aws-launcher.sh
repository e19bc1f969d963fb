#!/bin/bash
# Rendered by cluster/render.py from cluster/sizes.yaml: edit that file, not this one.
# Creates what Ray's launcher needs on AWS besides subnets with a NAT gateway: two instance
# profiles, a security group and the shared disk. Idempotent. Prints the values for sizes.yaml.
set -euo pipefail
cd "$(dirname "$0")"
export AWS_DEFAULT_REGION=us-east-1
# Spot machines need this role of the account; it may exist already.
aws iam create-service-linked-role --aws-service-name spot.amazonaws.com > /dev/null 2>&1 || true
aws iam get-role --role-name vlv-head > /dev/null 2>&1 || \
  aws iam create-role --role-name vlv-head --assume-role-policy-document '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}' > /dev/null
aws iam put-role-policy --role-name vlv-head --policy-name vlv \
  --policy-document file://aws-head.json
aws iam get-instance-profile --instance-profile-name vlv-head > /dev/null 2>&1 || \
  { aws iam create-instance-profile --instance-profile-name vlv-head > /dev/null && \
    aws iam add-role-to-instance-profile --instance-profile-name vlv-head --role-name vlv-head; }
aws iam get-role --role-name vlv-worker > /dev/null 2>&1 || \
  aws iam create-role --role-name vlv-worker --assume-role-policy-document '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}' > /dev/null
aws iam put-role-policy --role-name vlv-worker --policy-name vlv \
  --policy-document file://aws-worker.json
aws iam get-instance-profile --instance-profile-name vlv-worker > /dev/null 2>&1 || \
  { aws iam create-instance-profile --instance-profile-name vlv-worker > /dev/null && \
    aws iam add-role-to-instance-profile --instance-profile-name vlv-worker --role-name vlv-worker; }
VPC=$(aws ec2 describe-subnets --subnet-ids subnet-00000000000000000 \
  --query 'Subnets[0].VpcId' --output text)
GROUP=$(aws ec2 describe-security-groups --query 'SecurityGroups[0].GroupId' --output text \
  --filters Name=group-name,Values=vlv "Name=vpc-id,Values=$VPC")
if [ "$GROUP" = None ]; then
  GROUP=$(aws ec2 create-security-group --group-name vlv --description vlv --vpc-id "$VPC" \
    --query GroupId --output text)
  # Only members of the group can connect. SSM sessions need no open port.
  aws ec2 authorize-security-group-ingress --group-id "$GROUP" --protocol=-1 \
    --source-group "$GROUP" > /dev/null
fi
disk() {
  aws efs describe-file-systems --creation-token vlv --query "FileSystems[0].$1" --output text
}
if [ "$(disk FileSystemId)" = None ]; then
  aws efs create-file-system --creation-token vlv --encrypted --throughput-mode elastic \
    --tags Key=project,Value=vlv > /dev/null
fi
until [ "$(disk LifeCycleState)" = available ]; do sleep 2; done
DISK=$(disk FileSystemId)
TARGETS=$(aws efs describe-mount-targets --file-system-id "$DISK" --output text \
  --query 'MountTargets[].SubnetId')
for SUBNET in subnet-00000000000000000 subnet-11111111111111111; do
  [[ "$TARGETS" == *"$SUBNET"* ]] || aws efs create-mount-target --file-system-id "$DISK" \
    --subnet-id "$SUBNET" --security-groups "$GROUP" > /dev/null
done
echo "aws_security_group: $GROUP"
echo "aws_shared_disk: $DISK.efs.us-east-1.amazonaws.com:/"
echo "Put both under site in cluster/sizes.yaml, render again, and run this again: the head's policy names the group."
