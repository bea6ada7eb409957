package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestWriteOCIDiff(t *testing.T) {
	dir := func(name, opaque string) *tar.Header {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
		if opaque != "" {
			h = withXattr(h, "trusted.overlay.opaque", opaque)
		}
		return h
	}
	layer := whole(t,
		dir("d/", "y"), file("d/f"), &tar.Header{Typeflag: tar.TypeChar, Name: "d/gone"},
		&tar.Header{Typeflag: tar.TypeChar, Name: "gone"},
		dir("x/", "x"), withXattr(file("x/gone"), "trusted.overlay.whiteout", ""),
		&tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3},
		&tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "d"},
		&tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "d/f"},
		withXattr(file("xattr"), "user.x", "y"),
		withXattr(file("nested"), "trusted.overlay.overlay.opaque", "y"),
		sparseFile(5, "12;3,2;7,3"),
	)
	var out bytes.Buffer
	if err := WriteOCIDiff(context.Background(), &out, bytes.NewReader(layer)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		line := fmt.Sprintf("%c %s", h.Typeflag, h.Name)
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		if h.Devmajor != 0 {
			line += fmt.Sprintf(" %d:%d", h.Devmajor, h.Devminor)
		}
		for k, v := range h.PAXRecords {
			if k != "mtime" && k != "atime" {
				line += " " + k + "=" + v
			}
		}
		if h.Size > 0 {
			b, err := io.ReadAll(tr)
			must(t, err)
			line += fmt.Sprintf(" %q", b)
		}
		got = append(got, line)
	}
	want := []string{
		"5 ./", "5 d/", "0 d/.wh..wh..opq", "0 d/f", "0 d/.wh.gone", "0 .wh.gone", "5 x/", "0 x/.wh.gone", "3 null 1:3", "2 s -> d",
		"1 l -> d/f", "0 xattr SCHILY.xattr.user.x=y", "0 nested", `0 f "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestOCIContent: data and holes come out in their places.
func TestOCIContent(t *testing.T) {
	src := t.TempDir()
	f := write(t, src, "f", "")
	data := make([]byte, 3*bufferSize)
	copy(data[bufferSize+5000:], "middle")
	copy(data[len(data)-3:], "end")
	writeAt(t, f, data, bufferSize+5000, 6)
	writeAt(t, f, data, len(data)-3, 3)
	layer, _ := capture(t, src)
	if len(layer) > bufferSize {
		t.Fatalf("a layer of %d bytes: no holes", len(layer))
	}
	var out bytes.Buffer
	must(t, WriteOCIDiff(context.Background(), &out, bytes.NewReader(layer)))
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		must(t, err)
		if h.Name == "f" {
			got, err := io.ReadAll(tr)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("content differs (%v)", err)
			}
			return
		}
	}
}

func TestOCIUnsupported(t *testing.T) {
	for name, h := range map[string]*tar.Header{
		"redirect": withXattr(&tar.Header{Typeflag: tar.TypeDir, Name: "d/"}, "trusted.overlay.redirect", "/old"),
		"metacopy": withXattr(file("f"), "trusted.overlay.metacopy", ""),
		"name":     file(".wh.f"),
	} {
		t.Run(name, func(t *testing.T) {
			if err := WriteOCIDiff(context.Background(), io.Discard, bytes.NewReader(whole(t, h))); !errors.Is(err, checkpoint.ErrUnsupported) {
				t.Errorf("%v", err)
			}
		})
	}
	if err := WriteOCIDiff(context.Background(), io.Discard, bytes.NewReader(whole(t, file("../f")))); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("%v", err)
	}
}
