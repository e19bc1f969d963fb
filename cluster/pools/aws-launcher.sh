#!/bin/bash
# Rendered by cluster/render.py from cluster/sizes.yaml: change that, not this.
# What Ray's launcher expects on AWS beside subnets with a NAT gateway: two instance profiles, a
# security group and the shared disk. Run it once; it prints what goes into sizes.yaml.
set -euo pipefail
cd "$(dirname "$0")"
export AWS_DEFAULT_REGION=us-east-1
# Without this role of the account no spot machine starts; it may be there.
aws iam create-service-linked-role --aws-service-name spot.amazonaws.com || true
aws iam create-role --role-name vlv-head --assume-role-policy-document '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'
aws iam put-role-policy --role-name vlv-head --policy-name vlv \
  --policy-document file://aws-head.json
aws iam create-instance-profile --instance-profile-name vlv-head
aws iam add-role-to-instance-profile --instance-profile-name vlv-head --role-name vlv-head
aws iam create-role --role-name vlv-worker --assume-role-policy-document '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'
aws iam put-role-policy --role-name vlv-worker --policy-name vlv \
  --policy-document file://aws-worker.json
aws iam create-instance-profile --instance-profile-name vlv-worker
aws iam add-role-to-instance-profile --instance-profile-name vlv-worker --role-name vlv-worker
VPC=$(aws ec2 describe-subnets --subnet-ids subnet-00000000000000000 \
  --query 'Subnets[0].VpcId' --output text)
GROUP=$(aws ec2 create-security-group --group-name vlv --description vlv --vpc-id "$VPC" \
  --query GroupId --output text)
# Its own members alone get in: sessions come through SSM, which the machines call.
aws ec2 authorize-security-group-ingress --group-id "$GROUP" --protocol=-1 \
  --source-group "$GROUP" > /dev/null
DISK=$(aws efs create-file-system --encrypted --throughput-mode elastic --tags Key=project,Value=vlv \
  --query FileSystemId --output text)
until [ "$(aws efs describe-file-systems --file-system-id "$DISK" \
  --query 'FileSystems[0].LifeCycleState' --output text)" = available ]; do sleep 2; done
for SUBNET in subnet-00000000000000000 subnet-11111111111111111; do
  aws efs create-mount-target --file-system-id "$DISK" --subnet-id "$SUBNET" \
    --security-groups "$GROUP" > /dev/null
done
# The policy of the head names the group.
echo "aws_security_group: $GROUP"
echo "aws_shared_disk: $DISK.efs.us-east-1.amazonaws.com:/"
echo "Put both under site in cluster/sizes.yaml, render again, and then:"
echo "aws iam put-role-policy --role-name vlv-head --policy-name vlv --policy-document file://cluster/pools/aws-head.json"
