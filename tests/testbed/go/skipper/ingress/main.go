// The bed's ingress controller: skipper with all that a gRPC service behind an Ingress needs. Skipper itself takes
// no HTTP/2 without TLS, speaks HTTP/1.1 to its backends and drops trailers, in which gRPC has a call's status.
package main

import (
	"context"
	"net/http"
	"strings"

	log "github.com/sirupsen/logrus"
	"github.com/zalando/skipper"
	"github.com/zalando/skipper/config"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
)

// What a gRPC server that has nothing else to say puts into its headers, where only a trailer may have it as soon
// as a body could follow.
var statusHeaders = []string{"Grpc-Status", "Grpc-Message", "Grpc-Status-Details-Bin"}

type answerKey struct{}

// answer is the backend's response to a request, for those of its trailers that are there when its body has ended.
type answer struct {
	response *http.Response
}

func isGRPC(header http.Header) bool {
	return strings.HasPrefix(header.Get("Content-Type"), "application/grpc")
}

// withTrailers passes a backend's trailers on behind the body that skipper has copied.
func withTrailers(skipper http.Handler) http.Handler {
	return http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		if !isGRPC(request.Header) {
			skipper.ServeHTTP(writer, request)
			return
		}
		kept := &answer{}
		skipper.ServeHTTP(writer, request.WithContext(context.WithValue(request.Context(), answerKey{}, kept)))
		if kept.response == nil {
			return
		}
		for name, values := range kept.response.Trailer {
			for _, value := range values {
				writer.Header().Add(http.TrailerPrefix+name, value)
			}
		}
	})
}

// backends speaks HTTP/2 without TLS to the backends of gRPC calls, and what skipper would to all others.
type backends struct {
	others http.RoundTripper
	grpc   http.RoundTripper
}

func (b backends) RoundTrip(request *http.Request) (*http.Response, error) {
	kept, ok := request.Context().Value(answerKey{}).(*answer)
	if !ok {
		return b.others.RoundTrip(request)
	}
	request.Header.Set("Te", "trailers")
	response, err := b.grpc.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	if response.Trailer == nil {
		response.Trailer = http.Header{}
	}
	for _, name := range statusHeaders {
		if values := response.Header.Values(name); len(values) > 0 {
			response.Trailer[name] = values
			response.Header.Del(name)
		}
	}
	kept.response = response
	return response, nil
}

func newBackends(others http.RoundTripper) http.RoundTripper {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return backends{others: others, grpc: &http.Transport{Protocols: protocols}}
}

func main() {
	cfg := config.NewConfig()
	if err := cfg.Parse(); err != nil {
		log.Fatalf("Error processing config: %s", err)
	}
	log.SetLevel(cfg.ApplicationLogLevel)
	options := cfg.ToOptions()
	wrapped := options.CustomHttpHandlerWrap
	options.CustomHttpHandlerWrap = func(skipper http.Handler) http.Handler {
		return h2c.NewHandler(withTrailers(wrapped(skipper)), &http2.Server{})
	}
	options.CustomHttpRoundTripperWrap = newBackends
	if err := skipper.Run(options); err != nil {
		log.Fatal(err)
	}
}
