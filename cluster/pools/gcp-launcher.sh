#!/bin/bash
# Rendered by cluster/render.py from cluster/sizes.yaml: edit that file, not this one.
# Creates what Ray's launcher needs on GCP: accounts, NAT, firewall rules, the shared disk.
# Idempotent. A network has one NAT: remove it here if gke.sh created it.
set -euo pipefail
cd "$(dirname "$0")"
gcloud services enable --project=my-project artifactregistry.googleapis.com cloudresourcemanager.googleapis.com compute.googleapis.com file.googleapis.com iam.googleapis.com secretmanager.googleapis.com
gcloud iam roles describe vlvHead --project=my-project > /dev/null 2>&1 || \
  gcloud iam roles create vlvHead --project=my-project --file=gcp-head-role.yaml
gcloud iam service-accounts describe vlv-head@my-project.iam.gserviceaccount.com --project=my-project > /dev/null 2>&1 || \
  { gcloud iam service-accounts create vlv-head --project=my-project && sleep 15; }
gcloud projects add-iam-policy-binding my-project --member=serviceAccount:vlv-head@my-project.iam.gserviceaccount.com --condition=None \
  --role=roles/artifactregistry.reader
gcloud storage buckets add-iam-policy-binding gs://my-bucket --member=serviceAccount:vlv-head@my-project.iam.gserviceaccount.com \
  --role=roles/storage.objectUser
gcloud iam service-accounts describe vlv-worker@my-project.iam.gserviceaccount.com --project=my-project > /dev/null 2>&1 || \
  { gcloud iam service-accounts create vlv-worker --project=my-project && sleep 15; }
gcloud projects add-iam-policy-binding my-project --member=serviceAccount:vlv-worker@my-project.iam.gserviceaccount.com --condition=None \
  --role=roles/artifactregistry.reader
gcloud storage buckets add-iam-policy-binding gs://my-bucket --member=serviceAccount:vlv-worker@my-project.iam.gserviceaccount.com \
  --role=roles/storage.objectUser
gcloud projects add-iam-policy-binding my-project --member=serviceAccount:vlv-head@my-project.iam.gserviceaccount.com \
  --condition=None --role=projects/my-project/roles/vlvHead
gcloud iam service-accounts add-iam-policy-binding vlv-worker@my-project.iam.gserviceaccount.com --project=my-project \
  --member=serviceAccount:vlv-head@my-project.iam.gserviceaccount.com --role=roles/iam.serviceAccountUser
gcloud compute routers describe vlv-nat --project=my-project --region=us-central1 > /dev/null 2>&1 || \
  gcloud compute routers create vlv-nat --project=my-project --region=us-central1 --network=default
gcloud compute routers nats describe vlv-nat --project=my-project --region=us-central1 --router=vlv-nat > /dev/null 2>&1 || \
  gcloud compute routers nats create vlv-nat --project=my-project --region=us-central1 --router=vlv-nat \
  --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges
gcloud compute networks subnets update default --project=my-project --region=us-central1 \
  --enable-private-ip-google-access
# SSH is allowed only from Google's Identity-Aware Proxy.
gcloud compute firewall-rules describe vlv-ssh --project=my-project > /dev/null 2>&1 || \
  gcloud compute firewall-rules create vlv-ssh --project=my-project --network=default --allow=tcp:22 \
  --source-ranges=35.235.240.0/20 --target-service-accounts=vlv-head@my-project.iam.gserviceaccount.com,vlv-worker@my-project.iam.gserviceaccount.com
gcloud compute firewall-rules describe vlv-among --project=my-project > /dev/null 2>&1 || \
  gcloud compute firewall-rules create vlv-among --project=my-project --network=default \
  --allow=tcp,udp,icmp --source-service-accounts=vlv-head@my-project.iam.gserviceaccount.com,vlv-worker@my-project.iam.gserviceaccount.com --target-service-accounts=vlv-head@my-project.iam.gserviceaccount.com,vlv-worker@my-project.iam.gserviceaccount.com
gcloud filestore instances describe vlv --project=my-project --zone=us-central1-a > /dev/null 2>&1 || \
  gcloud filestore instances create vlv --project=my-project --zone=us-central1-a --tier=BASIC_SSD \
  --network=name=default --file-share=name=shared,capacity=2560GiB
echo "Set site.gcp_shared_disk to this address, followed by :/shared:"
gcloud filestore instances describe vlv --project=my-project --zone=us-central1-a \
  --format='value(networks[0].ipAddresses[0])'
