package reboot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// host is the machine that runs the test, as its guest reaches it.
const host = "10.0.2.2"

const (
	inDefault = "/api/v1/namespaces/default/"
	// slowly is the limit for what starts on a busy machine.
	slowly = 5 * time.Minute
)

// controlPlane is an API server and its etcd beside the machine, which its
// reboots leave alone. There is no scheduler, and there are no controllers: what
// those would do the test does.
type controlPlane struct {
	t          *testing.T
	url        string
	token      string // of one who may do everything
	client     *http.Client
	kubeconfig string            // for the kubelet
	uids       map[string]string // of the pods, by workload
}

// newControlPlane starts both with their data in dir, as they are in a cluster
// but for the authorization, and waits for the API.
func newControlPlane(t *testing.T, dir string) *controlPlane {
	t.Helper()
	c := &controlPlane{t: t, token: token(), uids: map[string]string{}}
	etcd := fmt.Sprintf("http://127.0.0.1:%d", freePort(t))
	port := freePort(t)
	c.url = fmt.Sprintf("https://127.0.0.1:%d", port)
	in := func(name string) string { return filepath.Join(dir, name) }
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"accounts.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		"tokens.csv":   []byte(c.token + ",operator,operator,system:masters\n"),
	} {
		if err := os.WriteFile(in(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	etcdDone := c.run(dir, "etcd", "--data-dir", in("etcd"), "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", "http://127.0.0.1:0", "--unsafe-no-fsync")
	apiDone := c.run(dir, "kube-apiserver", "--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--advertise-address", host,
		"--secure-port", fmt.Sprint(port), "--cert-dir", in("certificates"), "--token-auth-file", in("tokens.csv"),
		"--service-cluster-ip-range", "10.96.0.0/24", "--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", in("accounts.key"), "--service-account-signing-key-file", in("accounts.key"))

	// The server has made itself a certificate, for both of its addresses, with
	// that of its authority in the same file.
	var certificates []byte
	for deadline := time.Now().Add(slowly); ; time.Sleep(time.Second) {
		select {
		case <-etcdDone:
			t.Fatal("etcd has ended: see etcd.log")
		case <-apiDone:
			t.Fatal("the API server has ended: see kube-apiserver.log")
		default:
		}
		if certificates, err = os.ReadFile(in("certificates/apiserver.crt")); err == nil {
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(certificates)
			c.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
			c.kubeconfig = fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://%s:%d", certificate-authority-data: %s}}]
users: [{name: u, user: {token: %s}}]
`, host, port, base64.StdEncoding.EncodeToString(certificates), c.token)
			// The server makes the namespace after it has become ready.
			err = c.do(http.MethodGet, strings.TrimSuffix(inDefault, "/"), "", nil)
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no API after %v: %v", slowly, err)
		}
	}
	ca, err := json.Marshal(string(certificates))
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range []struct{ path, body string }{
		// What a cluster's controllers make for each namespace, and each pod mounts.
		{inDefault + "serviceaccounts", "{apiVersion: v1, kind: ServiceAccount, metadata: {name: default}}"},
		{inDefault + "configmaps", "{apiVersion: v1, kind: ConfigMap, metadata: {name: kube-root-ca.crt}, data: {ca.crt: " + string(ca) + "}}"},
		{"/apis/node.k8s.io/v1/runtimeclasses", "{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: stasis}, handler: stasis}"},
	} {
		c.must(http.MethodPost, object.path, object.body, nil)
	}
	return c
}

// run starts a program of test/vm/prepare-apiserver; done is closed when it has
// ended, with the test at the latest.
func (c *controlPlane) run(dir, name string, args ...string) (done chan struct{}) {
	c.t.Helper()
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	p := exec.Command(filepath.Join(env("STASIS_CACHE", "/var/cache/stasis"), "apiserver", name), args...)
	p.Stdout, p.Stderr = log, log
	if done, err = child(p, func() {}); err != nil {
		c.t.Fatalf("%v: see test/vm/prepare-apiserver", err)
	}
	c.t.Cleanup(func() {
		p.Process.Kill() //nolint:errcheck // it may have ended
		<-done
	})
	return done
}

// do sends an object, in YAML, and decodes the answer into into, if any.
func (c *controlPlane) do(method, path, body string, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/yaml")
	answer, _, err := do(c.client, req)
	if err != nil || into == nil {
		return err
	}
	return json.Unmarshal([]byte(answer), into)
}

func (c *controlPlane) must(method, path, body string, into any) {
	c.t.Helper()
	if err := c.do(method, path, body, into); err != nil {
		c.t.Fatalf("%s %s: %v", method, path, err)
	}
}

// create makes a workload's pod under the name that it would have as a static
// one, by which the node's helpers know it.
func (c *controlPlane) create(w workload) {
	c.t.Helper()
	as := w
	as.name += "-node"
	var made pod
	c.must(http.MethodPost, inDefault+"pods", as.manifest(0), &made)
	c.uids[w.name] = made.Metadata.UID // the server's, whatever the manifest says
}

// TestAPIServerPods: pods of an API server go through a reboot of their node,
// one of them replaced meanwhile as a StatefulSet's is.
func TestAPIServerPods(t *testing.T) {
	n := &node{machine: newMachine(t)}
	n.api = newControlPlane(t, n.dir)
	n.log("the API server answers")
	for _, w := range kinds() {
		switch w.name {
		case "counter", "set-0", "ordinary":
			w.more = "  nodeName: node\n  runtimeClassName: stasis\n" + w.more
			n.pods = append(n.pods, w)
			n.api.create(w)
		}
	}
	if err := n.writeSeed(); err != nil {
		t.Fatal(err)
	}
	n.on("6.12", defaultCPU)
	n.up(bootLimit)
	before := n.remember()
	seen := len(n.events())
	n.prepare("")
	n.reboot()
	for _, w := range n.pods {
		if w.key != "" {
			// Nobody is there to say that the pod has ended: it is deleted by force, as for a lost node.
			old := n.api.uids[w.name]
			n.api.must(http.MethodDelete, inDefault+"pods/"+w.name+"-node?gracePeriodSeconds=0", "", nil)
			n.api.create(w)
			if n.api.uids[w.name] == old {
				t.Fatalf("%s has its old UID", w.name)
			}
		}
	}
	n.on("7.2", defaultCPU)
	n.up(bootLimit)
	n.goneOn("7.2", before, seen)

	var now struct{ Items []pod }
	n.api.must(http.MethodGet, inDefault+"pods", "", &now)
	if len(now.Items) != len(n.pods) {
		t.Errorf("the API server has %d pods, not %d", len(now.Items), len(n.pods))
	}
	for _, p := range now.Items {
		name := strings.TrimSuffix(p.Metadata.Name, "-node")
		n.log("the API server says of %s: UID %s, %s, %d restarts", name, p.Metadata.UID, p.Status.Phase, p.attempt("c"))
		if p.Metadata.UID != n.api.uids[name] || p.Status.Phase != "Running" {
			t.Errorf("%s: UID %s, was made with %s; phase %s", name, p.Metadata.UID, n.api.uids[name], p.Status.Phase)
		}
	}
}
