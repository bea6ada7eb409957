package integration

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// TestStreamsOfRestored uses the streaming calls on a restored container:
// attach with standard input, exec with it, port-forward, logs.
func TestStreamsOfRestored(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	// Repeats every line of standard input and answers on port 7001.
	const program = `
import socket, sys, threading
def serve():
    s = socket.socket(); s.bind(("0.0.0.0", 7001)); s.listen(4)
    while True:
        c, _ = s.accept(); c.sendall(b"hello from the container\n"); c.close()
threading.Thread(target=serve, daemon=True).start()
print("ready", flush=True)
n = 0
for line in sys.stdin:
    n += 1
    print("line %d is %s" % (n, line.strip()), flush=True)
print("end of input", flush=True)
while True: threading.Event().wait(1)
`
	stdin := func(c *cri.ContainerConfig) { c.Stdin = true }
	start := func() (*pod, *ctr) {
		p := n.runPod(key, annotate(key))
		return p, p.start("c", "python", []string{"python3", "-c", program}, stdin)
	}
	// The stream protocol of the kubelet over a websocket: the first byte of a
	// message names the channel, 0 for standard input, 1 for standard output.
	// (crictl 1.30 has no working attach.)
	attach := func(c *ctr, line, want string) {
		t.Helper()
		r, err := n.rt.Attach(n.ctx(), &cri.AttachRequest{ContainerId: c.id, Stdin: true, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatalf("attach: %v", err)
		}
		config, err := websocket.NewConfig(strings.Replace(r.Url, "http", "ws", 1), "http://localhost")
		if err != nil {
			t.Fatal(err)
		}
		config.Protocol = []string{"v4.channel.k8s.io"}
		ws, err := config.DialContext(n.ctx())
		if err != nil {
			t.Fatalf("attach: %v", err)
		}
		defer ws.Close()
		ws.SetDeadline(time.Now().Add(deadline / 2))
		time.Sleep(300 * time.Millisecond) // until it is attached: output before that goes to the log only
		if err := websocket.Message.Send(ws, append([]byte{0}, line+"\n"...)); err != nil {
			t.Fatalf("attach: %v", err)
		}
		var got strings.Builder
		for !strings.Contains(got.String(), want) {
			var message []byte
			if err := websocket.Message.Receive(ws, &message); err != nil {
				t.Fatalf("attach: %v; received %q", err, got.String())
			}
			if len(message) > 0 && message[0] == 1 {
				got.Write(message[1:])
			}
		}
	}
	p, c := start()
	c.waitLog("ready")
	attach(c, "one", "line 1 is one")
	c.stop(30)
	wantEvent(t, key, event.Dumped, "")
	p.remove()

	p, c = start()
	wantEvent(t, key, event.Restored, "")
	attach(c, "two", "line 2 is two")
	eventually(t, "the line in the log", func() error {
		if !strings.Contains(c.log(), "line 2 is two") {
			return fmt.Errorf("log %q", c.log())
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "crictl", "exec", "-i", c.id, "cat")
	cmd.Stdin = strings.NewReader("through exec\n")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "through exec\n" {
		t.Errorf("exec -i cat: %q, %v", out, err)
	}
	forward := exec.CommandContext(ctx, "crictl", "port-forward", "--transport", "spdy", p.id, "17001:7001")
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { forward.Process.Kill(); forward.Wait() }()
	eventually(t, "port-forward", func() error {
		out, err := exec.CommandContext(ctx, "socat", "-u", "TCP:127.0.0.1:17001", "-").Output()
		if err != nil || string(out) != "hello from the container\n" {
			return fmt.Errorf("%q: %v", out, err)
		}
		return nil
	})
}
