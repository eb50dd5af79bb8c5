// Enforces NetworkPolicies on one node: kube-router's own controller of them, without its routes, its service proxy and
// its BGP, which are most of what kube-router is built from.
package main

import (
	"flag"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// A change is applied when it is seen; this repairs what somebody else did to the rules.
const repair = time.Minute

// Longest wait for the node to be known.
const patience = time.Minute

func main() {
	file := flag.String("kubeconfig", "", "how to reach the API server")
	node := flag.String("node", "", "the node's name")
	services := flag.String("services", "", "the addresses of Services")
	flag.Parse()
	rest, err := clientcmd.BuildConfigFromFlags("", *file)
	if err != nil {
		log.Fatal(err)
	}
	if err := run(kubernetes.NewForConfigOrDie(rest), *node, *services); err != nil {
		log.Fatal(err)
	}
}

func run(client kubernetes.Interface, node, services string) error {
	stop := make(chan struct{})
	factory := informers.NewSharedInformerFactory(client, 0)
	pods := factory.Core().V1().Pods().Informer()
	namespaces := factory.Core().V1().Namespaces().Informer()
	policies := factory.Networking().V1().NetworkPolicies().Informer()
	factory.Start(stop)
	factory.WaitForCacheSync(stop)

	config := options.NewKubeRouterConfig()
	config.HostnameOverride = node
	config.ClusterIPCIDRs = []string{services}
	config.IPTablesSyncPeriod = repair
	// The bed's nodes have IPv4 addresses only.
	config.EnableIPv4, config.EnableIPv6 = true, false
	tables, sets, err := netpol.NewIPTablesHandlers(config)
	if err != nil {
		return err
	}
	var mutex sync.Mutex
	attempt := func() (*netpol.NetworkPolicyController, error) {
		return netpol.NewNetworkPolicyController(client, config, pods, policies, namespaces, &mutex, tables, sets)
	}
	controller, err := attempt()
	// A node that was just switched on is not known yet, or has no address.
	for began := time.Now(); err != nil && time.Since(began) < patience; controller, err = attempt() {
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	handlers := map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		pods:       controller.PodEventHandler,
		namespaces: controller.NamespaceEventHandler,
		policies:   controller.NetworkPolicyEventHandler,
	}
	for informer, handler := range handlers {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}

	// Nobody reads how it is doing, but it stops when it cannot say.
	beats := make(chan *healthcheck.ControllerHeartbeat, 1)
	go func() {
		for range beats {
		}
	}()
	var running sync.WaitGroup
	running.Add(1)
	go controller.Run(beats, stop, &running)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	<-ended
	close(stop)
	running.Wait()
	return nil
}
