#!/bin/bash
# Rendered by cluster/render.py from cluster/sizes.yaml: edit that file, not this one.
# A cluster that enforces NetworkPolicies (Dataplane V2), with a node pool for each group.
set -euo pipefail
gcloud compute routers describe vlv-nat --project=my-project --region=us-central1 > /dev/null 2>&1 || \
  gcloud compute routers create vlv-nat --project=my-project --region=us-central1 --network=default
gcloud compute routers nats describe vlv-nat --project=my-project --region=us-central1 --router=vlv-nat > /dev/null 2>&1 || \
  gcloud compute routers nats create vlv-nat --project=my-project --region=us-central1 --router=vlv-nat \
  --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges
gcloud container clusters create vlv --project=my-project --region=us-central1 \
  --enable-dataplane-v2 --enable-ip-alias --enable-private-nodes --release-channel=regular \
  --workload-pool=my-project.svc.id.goog --addons=GcpFilestoreCsiDriver \
  --network=default --machine-type=e2-standard-2 --num-nodes=1 --shielded-secure-boot
gcloud container node-pools create vlv-head \
  --cluster=vlv \
  --project=my-project --region=us-central1 \
  --node-locations=us-central1-a,us-central1-c --location-policy=ANY \
  --machine-type=n2-standard-8 \
  --disk-type=pd-balanced --disk-size=200 \
  --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes=3 \
  --node-labels=vlv-group=head \
  --labels=project=vlv
gcloud container node-pools create vlv-cpu \
  --cluster=vlv \
  --project=my-project --region=us-central1 \
  --node-locations=us-central1-a,us-central1-c --location-policy=ANY \
  --machine-type=c3-highcpu-44 \
  --disk-type=pd-balanced --disk-size=100 \
  --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes=8 \
  --node-labels=vlv-group=cpu \
  --labels=project=vlv
gcloud container node-pools create vlv-gpu \
  --cluster=vlv \
  --project=my-project --region=us-central1 \
  --node-locations=us-central1-a,us-central1-c --location-policy=ANY \
  --machine-type=a2-ultragpu-8g \
  --disk-type=pd-balanced --disk-size=500 \
  --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes=1 \
  --node-labels=vlv-group=gpu \
  --labels=project=vlv \
  --accelerator=type=nvidia-a100-80gb,count=8,gpu-driver-version=latest
gcloud container node-pools create vlv-gpu-spot \
  --cluster=vlv \
  --project=my-project --region=us-central1 \
  --node-locations=us-central1-a,us-central1-c --location-policy=ANY \
  --machine-type=g2-standard-16 \
  --disk-type=pd-balanced --disk-size=150 \
  --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes=8 \
  --node-labels=vlv-group=gpu_spot \
  --labels=project=vlv \
  --accelerator=type=nvidia-l4,count=1,gpu-driver-version=latest \
  --spot --node-taints=vlv-spot=true:NoSchedule
gcloud container node-pools create vlv-gpu-spot-on-demand \
  --cluster=vlv \
  --project=my-project --region=us-central1 \
  --node-locations=us-central1-a,us-central1-c --location-policy=ANY \
  --machine-type=g2-standard-16 \
  --disk-type=pd-balanced --disk-size=150 \
  --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes=8 \
  --node-labels=vlv-group=gpu_spot \
  --labels=project=vlv \
  --accelerator=type=nvidia-l4,count=1,gpu-driver-version=latest
# Pods access the buckets as their Kubernetes service accounts.
NUMBER=$(gcloud projects describe my-project --format='value(projectNumber)')
for BUCKET in my-bucket; do for ACCOUNT in vlv-head vlv-worker; do
  gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role=roles/storage.objectUser \
    --member="principal://iam.googleapis.com/projects/$NUMBER/locations/global/workloadIdentityPools/my-project.svc.id.goog/subject/ns/vlv/sa/$ACCOUNT"
done; done
