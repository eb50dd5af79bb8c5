// Gives each claim of the bed's storage class a folder that every node can mount, and removes it with the claim.
// Kubernetes' own provider of such volumes makes folders that only root can write.
package main

import (
	"context"
	"flag"
	"log"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	storageClass = "standard"
	// Two small lists a round: a claim waits half a second at most.
	round = 500 * time.Millisecond
)

func main() {
	config := flag.String("kubeconfig", "", "how to reach the API server")
	directory := flag.String("directory", "", "where the volumes' folders are made")
	flag.Parse()
	rest, err := clientcmd.BuildConfigFromFlags("", *config)
	if err != nil {
		log.Fatal(err)
	}
	client := kubernetes.NewForConfigOrDie(rest)
	for ; ; time.Sleep(round) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := provide(ctx, client, *directory); err != nil {
			log.Print("provide: ", err)
		}
		if err := reclaim(ctx, client, *directory); err != nil {
			log.Print("reclaim: ", err)
		}
		cancel()
	}
}

func provide(ctx context.Context, client kubernetes.Interface, directory string) error {
	claims, err := client.CoreV1().PersistentVolumeClaims("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, claim := range claims.Items {
		class := claim.Spec.StorageClassName
		if claim.Status.Phase != corev1.ClaimPending || claim.Spec.VolumeName != "" || class == nil || *class != storageClass {
			continue
		}
		name := "pvc-" + string(claim.UID)
		folder := filepath.Join(directory, name)
		if err := os.MkdirAll(folder, 0o777); err != nil {
			return err
		}
		// MkdirAll follows the umask; a pod's user may be anyone.
		if err := os.Chmod(folder, 0o777); err != nil {
			return err
		}
		kind := corev1.HostPathDirectory
		_, err := client.CoreV1().PersistentVolumes().Create(ctx, &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PersistentVolumeSpec{
				StorageClassName:              storageClass,
				AccessModes:                   claim.Spec.AccessModes,
				Capacity:                      corev1.ResourceList{corev1.ResourceStorage: *claim.Spec.Resources.Requests.Storage()},
				PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
				PersistentVolumeSource: corev1.PersistentVolumeSource{
					HostPath: &corev1.HostPathVolumeSource{Path: folder, Type: &kind},
				},
				ClaimRef: &corev1.ObjectReference{
					APIVersion: "v1", Kind: "PersistentVolumeClaim",
					Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
				},
			},
		}, metav1.CreateOptions{})
		if err != nil && !errors.IsAlreadyExists(err) {
			return err
		}
	}
	return nil
}

func reclaim(ctx context.Context, client kubernetes.Interface, directory string) error {
	volumes, err := client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, volume := range volumes.Items {
		released := volume.Status.Phase == corev1.VolumeReleased || volume.Status.Phase == corev1.VolumeFailed
		if !released || volume.Spec.StorageClassName != storageClass {
			continue
		}
		if err := os.RemoveAll(filepath.Join(directory, volume.Name)); err != nil {
			return err
		}
		if err := client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return nil
}
